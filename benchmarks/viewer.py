"""`python -m benchmarks.viewer`: latency and memory of the viewer on this computer, as JSON.

A synthetic slide with a pyramid stands in for a scanned one; clients are threads of another process, each of which
asks for the deep-zoom tiles that a browser shows while someone moves over the slide.
"""

import argparse
import http.client
import json
import multiprocessing
import platform
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from benchmarks.measure import machine
