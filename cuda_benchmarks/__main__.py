"""`python cuda_benchmarks [FAMILY ...]`: all families of benchmarks, see harness.py."""

import sys

import harness

if __name__ == "__main__":
    sys.exit(harness.main())
