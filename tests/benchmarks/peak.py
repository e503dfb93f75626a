"""Runs a program to its end and prints the most memory that it had resident: peak.py PROGRAM [ARGUMENT...]"""

import resource
import subprocess
import sys

done = subprocess.run(sys.argv[1:])
# Linux counts in KiB.
print(f"peak: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MiB")
sys.exit(done.returncode)
