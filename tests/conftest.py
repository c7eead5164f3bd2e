"""Tests measure for themselves: what earlier runs on this machine measured is not used."""

from __future__ import annotations

import os

os.environ["HARMONY_MEASUREMENTS"] = "off"
