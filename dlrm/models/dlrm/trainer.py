"""What is DLRM's own in a training: its learning rate, mixed precision, exact AUROC, its lines of results."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from dlrm.models.dlrm.defaults import choose_rate
from dlrm.models.dlrm.inference import Repetitions, format_table, select_sizes, take_batches, time_batches
from dlrm.models.dlrm.options import check_shared_sizes
from dlrm.runtime import session
from dlrm.trainer import mixed_precision
from dlrm.trainer.lr_schedule import Schedule, learning_rate
from dlrm.trainer.metrics import AurocCollector
from dlrm.trainer.trainer import Trainer


class DLRMTrainer(Trainer):
    make_metrics = AurocCollector
    labels_are_clicks = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.inference: list[dict[str, Any]] = []  # of `benchmark_inference`, one for each batch size
        optim = self.options.optim
        self.schedule = Schedule(
            "change" if optim.change_lr else optim.lr_schedule,
            optim.lr_warmup_steps,
            optim.lr_decay_start,
            optim.lr_decay_steps,
            warmup_factor=optim.lr_warmup_factor,
            change_step=int(optim.lr_change_point * self.epoch_steps),
            change_to=optim.lr_after_change_point,
        )

    def learning_rate(self) -> float:
        return learning_rate(self.progress.step, self.options.optim.learning_rate, self.schedule)

    def enable_mixed_precision(self, kind: str, scale: mixed_precision.LossScale | None) -> None:
        whole: Any = self.model.module
        mixed_precision.cast_dense_part(whole.model, self.device, kind, scale)

    def advise_on_loss(self) -> str:
        optim, run = self.options.optim, self.options.run
        usual = choose_rate(optim.name, self.options.data.batch_size * dist.get_world_size())
        rate = usual if not 1 / 3 < optim.learning_rate / usual < 3 else optim.learning_rate / 10
        preset = "" if run.preset == "kaggle" else " or --preset kaggle"
        return f"try --learning_rate {rate:g}{preset}"

    def benchmark_inference(self) -> None:
        run, options, batches = self.options.run, self.options.inference, self.datasets.test.batches
        name, sizes = "inference_benchmark_batch_sizes", options.inference_benchmark_batch_sizes
        repetitions = Repetitions(run.benchmark_warmup_steps, options.inference_benchmark_steps, 0)
        with session.errors_on_all_ranks():
            check_shared_sizes(name, sizes, batches.world_size)
            sizes, left_out = select_sizes(name, sizes, batches.source.rows)
        if left_out:
            self.run_folder.print_warning(left_out)
        self.model.eval()
        for size in sizes:
            with session.errors_on_all_ranks():
                pool = take_batches(batches.source, batches.to_batch, size, batches.rank, batches.world_size)
            timed = time_batches(self.model, pool, repetitions, self.device)
            self.inference.append({"batch_size": size, **timed})
        self.run_folder.print_line(format_table(self.inference))
        head = {"results": self.inference, "world_size": batches.world_size, "device": self.device.type}
        self.run_folder.print_line(json.dumps(head | {"model": asdict(self.options.model)}))

    def collect_results(self) -> Mapping[str, Any]:
        test = self.results.get("test", {})
        old_names = {"val_aurocs": self.progress.val_scores}  # now val_scores; written for one release
        scores = {"best_auroc": self.progress.best_score, "test_auroc": test.get("auroc")}
        timed = {"inference_benchmark": self.inference} if self.inference else {}
        return {**super().collect_results(), **old_names, **scores, **timed}
