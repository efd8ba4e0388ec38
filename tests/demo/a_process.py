"""A process for the tests of demo.processes: writes its endpoint file, then behaves as its first argument says."""

import os
import signal
import sys
import time
from pathlib import Path

from rlhf.endpoint import write_endpoint_file

behaviour, endpoint_file = sys.argv[1], sys.argv[sys.argv.index("--endpoint-file") + 1]
print(f"this one {behaviour}", flush=True)
if behaviour == "fails-early":
    sys.exit("something is missing")
if behaviour == "stays-silent":
    time.sleep(60)
if behaviour == "ignores-sigterm":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
write_endpoint_file(Path(endpoint_file), address="127.0.0.1:5001", metrics_url=None)
if behaviour == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
