"""What results.json says of any training, real or emulated.

In: how far it came, its evaluations, the bytes that each rank counts. Out: entries, by their keys.
"""

from typing import Any

from dlrm.trainer.loop import Progress


def describe_results(
    progress: Progress, evaluations: dict[str, Any], read: list[dict[str, int]], written: list[dict[str, int]]
) -> dict[str, Any]:
    """read, written: by rank, bytes by file."""
    return {
        "evaluations": evaluations,
        "steps": progress.step,
        "samples": progress.samples,
        "samples_per_second": progress.timed_samples / progress.seconds if progress.seconds else None,
        "bytes_read": {str(rank): files for rank, files in enumerate(read)},
        "bytes_written": {str(rank): files for rank, files in enumerate(written)},
        "world_size": len(read),
    }
