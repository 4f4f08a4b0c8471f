"""Batches of an opened data set: the rows of a forward pass, read, checked against their sizes, and put together."""

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from vlm_tune.config.schema import AugmentConfig
from vlm_tune.data.batch import Batch, add_pictures, as_pairs, collate, token_weight
from vlm_tune.data.example import Example, num_in_pack
from vlm_tune.data.packing import trees_of
from vlm_tune.data.rows.cache import hashed
from vlm_tune.data.sample import Sample
from vlm_tune.data.sets.dataset import Conversations
from vlm_tune.data.sets.index import picture_files, trained_content
from vlm_tune.data.sets.mixture import Mixture
from vlm_tune.data.sizes import Index
from vlm_tune.data.stream import MicroBatch, StreamSettings
from vlm_tune.errors import DataError, VlmTuneError


class MicroBatches(Dataset[Batch]):
    """Load the batch of a MicroBatch. Random augmentation depends only on (seed, epoch, row).

    reference   of pairs, by entry of the index: (rows, 2) log-probabilities, once they are known
    """

    def __init__(
        self,
        data: Conversations | Mixture,
        index: Index,
        settings: StreamSettings,
        is_training: bool,
        reference: npt.NDArray[np.float32] | None = None,
    ) -> None:
        self.data = data
        self.index = index
        self.settings = settings
        self.is_training = is_training
        self.reference = reference

    def __getitem__(self, item: MicroBatch) -> Batch:
        examples, shown, tiles, features = [], [], [], []
        trees = trees_of(item.rows, self.index, self.settings.share_prefix)
        for tree in trees:
            for place, entry in enumerate(tree):
                row = int(self.index.rows[entry])
                data, number = self.data.locate(row)
                sample = data.sample(number)
                self._check_content(entry, sample)
                branches = data.encoder.encode_all(sample, data.tiling(sample))
                example = branches[0]
                self._check_sizes(entry, branches)
                self._check_pictures(entry, sample, data)
                examples += branches
                if place:
                    continue  # its pictures are those of the first row
                shown.append(example)
                is_random = self.is_training and data.pictures.augment != AugmentConfig()
                generator = np.random.default_rng((self.settings.seed, item.epoch, row)) if is_random else None
                if data.cache is None:
                    tiles.append(data.make_tiles(sample, example, generator))
                elif example.num_tiles:
                    features.append(data.read_features(sample, example))
        counts = np.array([example.num_supervised for example in examples], dtype=np.int32)
        weights = token_weight(counts, self.settings.loss) / item.step_weight
        num_branches = len(examples) // len(item.rows)  # 2 of pairs
        sizes = [len(tree) * num_branches for tree in trees]
        batch = collate(examples, weights.tolist(), self.settings.packing, sizes)
        if num_branches == 2:
            known = None if self.reference is None else self.reference[list(item.rows)]
            batch = as_pairs(batch, counts.tolist(), 1 / item.step_weight, known)
        add_pictures(batch, shown, tiles, features, data.encoder.context_id)
        batch.place, batch.cursor = item.place, item.after
        return batch

    def _check_content(self, entry: int, sample: Sample) -> None:
        """Refuse a row whose file was written anew since it was measured: it may be another row's place by now."""
        if hashed(trained_content(sample)) != int(self.index.content[entry]):
            reason = (
                "says something else than when it was measured: the file was changed while the run goes on. Put it "
                "back and go on with resume=last, or start a new run with stage.init_from=RUN"
            )
            raise DataError(reason, sample.where, sample.id)

    def _check_sizes(self, entry: int, branches: list[Example]) -> None:
        """Refuse a row whose pictures were replaced after it was measured: its pack was planned for the old ones."""
        planned = int(self.index.tokens[entry]), int(self.index.supervised[entry]), int(self.index.tiles[entry])
        example, num_tokens = branches[0], num_in_pack([each.input_ids for each in branches])
        made = num_tokens, sum(each.num_supervised for each in branches), sum(example.num_tiles)
        if made != planned:
            reason = (
                "has {} tokens, {} supervised, and {} tiles, but had {}, {} and {} when it was measured: a picture was "
                "replaced. Put it back, or save the data file again, so that all rows are measured again"
            )
            raise DataError(reason.format(*made, *planned), example.where, example.id)

    def _check_pictures(self, entry: int, sample: Sample, data: Conversations) -> None:
        """Refuse a row whose pictures were replaced by others of the same size."""
        if picture_files(sample, data.reader) != int(self.index.pictures[entry]):
            reason = (
                "shows another picture than when it was measured, of the same size. Put it back, or save the data file "
                "again, so that all rows are measured again"
            )
            raise DataError(reason, sample.where, sample.id)


class Handed(Dataset[Batch | VlmTuneError]):
    """Return a row's fault as a value: raised in a worker process, it would arrive as text with torch's traceback."""

    def __init__(self, batches: MicroBatches) -> None:
        self.batches = batches

    def __getitem__(self, item: MicroBatch) -> Batch | VlmTuneError:
        try:
            return self.batches[item]
        except VlmTuneError as error:
            return error
        except OSError as error:
            reason = f"{error.strerror}: it was there when the run began. Put it back and go on with resume=last"
            return DataError(reason, str(error.filename))
