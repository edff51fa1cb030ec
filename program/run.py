"""One start of a run: everything that the loop in `train.py` works with."""

from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.stages import Stages
from parallel.mesh import MeshShape
from program.config import TrainProgram, plain
from training.run_folder import RunFolder

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from data.dataset import Dataset
    from data.loader import StepBatches
    from data.stream import StreamDataset
    from parallel.strategy import MeshStrategy
    from training.console import Console
    from training.ledger import Ledger
    from training.metrics import MetricsLog
    from training.position import Position


@dataclass
class Run:
    """Everything that one start of a run works with."""

    config: TrainProgram
    mesh: MeshShape
    fabric: "Fabric"
    strategy: "MeshStrategy"
    model: Any  # Fabric's wrapper around the sharded Llama
    optimizer: Any  # Fabric's wrapper around AdamW
    dataset: "Dataset | StreamDataset"
    position: "Position"
    console: "Console"
    stages: Stages
    ledger: "Ledger | None" = None  # rank 0 alone writes ledger and figures
    metrics: "MetricsLog | None" = None
    last_figures: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> RunFolder:
        """Where everything of the run lies."""
        return RunFolder(Path(self.config.run.dir))

    @property
    def validation_batch_size(self) -> int:
        """Held-out sequences that a data rank computes at a time."""
        train = self.config.train
        return train.micro_batch_size or train.global_batch_size // self.mesh.dp

    @property
    def data_rank(self) -> int:
        """Which of the mesh's `dp` shares of a batch this process reads."""
        return self.mesh.data_rank(self.fabric.global_rank)

    def batches(self) -> Generator["StepBatches", None, None]:
        """This process's batches of every step from the run's position on, read ahead."""
        from data.loader import TrainLoader
        from data.stream import StreamDataset, StreamLoader

        data, rank, size = self.config.data, self.data_rank, self.mesh.dp
        on_gpu = self.fabric.device.type == "cuda"
        if isinstance(self.dataset, StreamDataset):
            return StreamLoader(
                self.dataset,
                self.stages.at(0),
                rank=rank,
                size=size,
                places=self.position.lanes,
                pin_memory=on_gpu,
                threads=data.loader_threads,
                prefetch=data.prefetch,
            ).steps(self.position.step)
        return TrainLoader(
            self.dataset,
            self.stages,
            seed=self.config.run.seed,
            rank=rank,
            size=size,
            shuffle_block_tokens=data.shuffle_block_tokens,
            pin_memory=on_gpu,
            threads=data.loader_threads,
            prefetch=data.prefetch,
        ).steps(self.position.step)

    def open_logs(self, changed: dict[str, Any]) -> None:
        """Writes the configuration and opens ledger and figures; rank 0 alone calls it."""
        from training.ledger import Ledger
        from training.metrics import MetricsLog

        self.folder.write_config(plain(self.config))
        self.ledger = Ledger(self.folder.ledger, self.console.note)
        self.ledger.append("start", step=self.position.step, mesh=str(self.mesh), changed=changed)
        self.metrics = MetricsLog(
            self.folder.path,
            self.config.log.tensorboard,
            self.config.log.wandb,
            run_name=self.config.run.name,
            run_config=plain(self.config),
            first_step=self.position.step,
            warn=self.console.note,
        )
