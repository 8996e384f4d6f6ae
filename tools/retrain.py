#!/usr/bin/env python3
"""Retrain a reborn net step by step; killed, it goes on when started again."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rebirth_caffe import cli
from rebirth_caffe.retrain_command import main

if __name__ == "__main__":
    cli.run(main)
