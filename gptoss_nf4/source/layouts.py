"""The layouts of gpt-oss checkpoints that can be read, and opening one."""

from pathlib import Path

from gptoss_nf4.format.config_fields import served_config
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.source.fused import FusedSource
from gptoss_nf4.source.interface import Source
from gptoss_nf4.source.refused import require_checkpoint, require_directory, require_known_kind, unsupported
from gptoss_nf4.source.side_files import TEMPLATE_DIRECTORY
from gptoss_nf4.source.split import SplitSource
from gptoss_nf4.source.wrappers import unwrapped
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.reading import read_json_object, require_plain_files

# One class for each layout. The first that recognises a checkpoint opens it.
LAYOUTS: tuple[type[Source], ...] = (FusedSource, SplitSource)


def open_checkpoint(directory: Path) -> Source:
    """Open the checkpoint in `directory` by the class of its layout. UserError where no class recognises it."""
    require_checkpoint(require_directory(str(directory)))
    require_plain_files(directory, TEMPLATE_DIRECTORY)
    checkpoint = Checkpoint(directory)
    require_known_kind(checkpoint)
    checkpoint.tensors, renamed = unwrapped(checkpoint.tensors)
    for layout in LAYOUTS:
        if layout.recognises(checkpoint):
            source = layout(checkpoint)
            source.renamed = renamed
            return source
    raise unsupported(checkpoint)


def layer_count(directory: Path) -> int:
    """Number of layers of the checkpoint in `directory`. Only its config.json is read, and checked as `Source` does."""
    path = directory / "config.json"
    return Dimensions.from_config(served_config(read_json_object(path), path), path).layers
