# SPDX-License-Identifier: Apache-2.0
"""The frozen model's hidden states over training text.

``texts`` cuts data into sequences, ``teacher`` runs the model over them and ``cache``
keeps what it computed, so that a run is continued and heads are trained from the disk.
"""
