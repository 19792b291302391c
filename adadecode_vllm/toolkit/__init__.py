# SPDX-License-Identifier: Apache-2.0
"""For those who make heads: nothing that serves imports any of it.

``data`` makes training text, ``states`` runs the frozen model over it once and keeps
what it computed, ``evaluation`` says what heads will do, ``training`` makes them,
``publishing`` puts them on the Hub, ``report`` draws, ``stats`` watches a server, and
``doctor`` says what would stop one.
"""
