"""The job on a Ray cluster of two nodes, one of which is killed in the middle."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT

from convmixer import Classifier

pytestmark = pytest.mark.skipif(
    not find_spec("ray"), reason="the extra is not installed: pip install 'convmixer[cluster]'"
)

# A cluster in a process of its own: what is left of it goes with that process.
RUN = """
import sys, threading, time, ray
from ray.cluster_utils import Cluster
from convmixer import cluster as job

pictures, output, model = sys.argv[1:]
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
lost = nodes.add_node(num_cpus=2)
nodes.wait_for_nodes()
ray.init(address=nodes.address, log_to_driver=False)
job.BATCH = 4
answering = job.Answering.__call__
def slowly(self, batch):
    time.sleep(0.2)  # so that there is a middle
    return answering(self, batch)
job.Answering.__call__ = slowly

def kill():
    while not any(actor["State"] == "ALIVE" for actor in ray._private.state.actors().values()):
        time.sleep(0.1)
    time.sleep(1)
    nodes.remove_node(lost, allow_graceful=False)

killer = threading.Thread(target=kill)
killer.start()
job.classify([pictures], output, model, top_k=2, actors=2)
killer.join()
print(sorted(node["Alive"] for node in ray.nodes()))
ray.shutdown()
nodes.shutdown()
"""


@pytest.mark.timeout(600)
def test_a_lost_node_loses_no_picture_and_doubles_none(tmp_path, random_checkpoint, picture):
    import pyarrow.parquet

    folder, output, model = tmp_path / "pictures", tmp_path / "answers", random_checkpoint()
    folder.mkdir()
    for seed in range(40):
        picture(seed=seed).save(folder / f"{seed:02}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    command = [sys.executable, "-c", RUN, str(folder), str(output), str(model)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0 and "[False, True]" in done.stdout.splitlines(), done.stderr[-3000:]
    rows = sorted(pyarrow.parquet.read_table(output).to_pylist(), key=lambda row: row["image"])
    assert [row["image"] for row in rows] == sorted(str(path) for path in folder.iterdir())
    *good, broken = rows
    assert broken["problem"].startswith(f"{folder}/broken.png cannot be read") and broken["label_1"] is None
    expected = Classifier(model, device="cpu").classify_many([row["image"] for row in good], 2)
    assert [(row["label_1"], row["label_2"], row["problem"]) for row in good] == [
        (first.label, second.label, "") for first, second in expected
    ]


def test_a_cluster_that_is_not_there_is_one_line(tmp_path, python):
    run = python("-m", "convmixer.cluster", tmp_path, "--output", "out", env=os.environ | {"RAY_TMPDIR": str(tmp_path)})
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("convmixer.cluster: "), run.stderr
