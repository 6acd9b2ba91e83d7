"""Slices of two processes on the disk: our writer beside torch's safetensors storage, seconds and memory, in one run.

torchrun --nproc-per-node 2 -m benchmarks.checkpoint_storage [--tensors 64] [--rounds 2]
"""

import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ditmoe.run_folder import writer


def by_torch(root: Path, parts: dict[str, torch.Tensor]) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    slices = {k: DTensor.from_local(v, mesh, [Shard(0)], run_check=False) for k, v in parts.items()}
    dcp.save(slices, storage_writer=HuggingFaceStorageWriter(path=str(root), save_distributed=True))


def by_us(root: Path, parts: dict[str, torch.Tensor]) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank:
        return writer.write_shard(root, 1, rank, {f"model.shard-{rank}": parts}, "token")
    writer.save(root, 1, {"model.shard-0": parts}, {}, "token", world)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=64, help="of 4 MB")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    parts = {f"w{i}": torch.randn(1024, 1024) for i in range(args.tensors)}
    for number in range(args.rounds):
        for name, save in (("ours", by_us), ("torch", by_torch)):  # the peak only grows: the smaller one comes first
            folder: list[str | None] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(folder)
            before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
            save(Path(str(folder[0])), parts)
            dist.barrier()
            seconds, grown = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            if dist.get_rank() == 0:
                size = sum(value.nbytes for value in parts.values()) / 2**20
                print(f"round {number}, {name}: {seconds:.2f} s, peak +{grown / 1024:.0f} MB for {size:.0f} MB")
                shutil.rmtree(str(folder[0]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
