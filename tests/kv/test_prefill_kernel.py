"""Prefill's kernel in Triton's interpreter, which needs a process of its own: it is chosen when a kernel is defined."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.kv.prefill_contract import Chunk, errors
from turbomoe.kv.prefill import attend_block

pytest.importorskip("triton")
