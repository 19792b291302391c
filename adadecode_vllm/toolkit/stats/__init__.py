# SPDX-License-Identifier: Apache-2.0
"""`adadecode stats`: a running server's counters in the terminal."""
