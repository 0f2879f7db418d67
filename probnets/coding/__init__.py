r"""Lossless coding of images with circuits, exact on every machine."""

from .codec import decode_rows as decode_rows
from .codec import encode_rows as encode_rows
from .compression import compress as compress
from .compression import compress_batch as compress_batch
from .compression import decompress as decompress
from .compression import decompress_batch as decompress_batch
from .conditional import decode_conditional as decode_conditional
from .conditional import encode_conditional as encode_conditional
from .errors import ImageWarning as ImageWarning
from .errors import StreamError as StreamError
from .lengths import code_lengths as code_lengths
from .models import ImageModel as ImageModel
from .models import load_model as load_model
from .models import pretrained as pretrained
from .notes import Notes as Notes
from .notes import read_notes as read_notes
from .photographs.model import PhotographModel as PhotographModel
from .photographs.training import TrainingSettings as TrainingSettings
from .photographs.training import train_photographs as train_photographs
from .tables import CodeTables as CodeTables
from .training import train_tiles as train_tiles
from .training import train_whole as train_whole
from .trees import TreeModel as TreeModel
from .treetraining import train_trees as train_trees
