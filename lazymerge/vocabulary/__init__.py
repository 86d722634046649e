"""Tokenizers as data: their vocabularies, the output's, and where each model has its rows."""

from .build import Alignment, Member, OutputVocabulary, output_vocabulary
from .reading import Folder, MadeTokenizer, Vocabulary, read_vocabulary

__all__ = [
    "Alignment",
    "Folder",
    "MadeTokenizer",
    "Member",
    "OutputVocabulary",
    "Vocabulary",
    "output_vocabulary",
    "read_vocabulary",
]
