"""Files that are written whole or not at all."""

import subprocess
import sys
from pathlib import Path

WRITE = """
import sys
from pathlib import Path
from multiverse_hf.outputs import write_output
for number in range(200):
    write_output(Path(sys.argv[1]), f"{number}\\n")
"""


def test_processes_that_write_to_one_folder_do_not_disturb_each_other(tmp_path: Path):
    paths = [tmp_path / f"{number}.txt" for number in range(4)]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITE, path], stderr=subprocess.PIPE, text=True) for path in paths
    ]
    assert [(writer.communicate()[1], writer.returncode) for writer in writers] == [("", 0)] * 4
    assert [path.read_text() for path in paths] == ["199\n"] * 4
    assert sorted(tmp_path.iterdir()) == paths
