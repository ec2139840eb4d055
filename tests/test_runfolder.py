"""Run folders: a name for each run, nothing of others' touched, and none left after a mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_folder import ROOT  # noqa: F401
