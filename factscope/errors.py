"""Everything that can go wrong for a reason a user can act on.

FactScopeError                 one sentence: the value, why it cannot be used, what to try
|-- InputError                 exit status 2
|   |-- PromptError            empty, too long, control characters
|   |-- SubjectError           missing from the prompt, ambiguous, or no token left to it
|   |-- TargetError            empty answer, answer not tokenizable, answer equal to the foil
|   |-- SpecError              window, layer, head, position, site ... out of range or not a number
|   |-- DatasetError           a facts file that cannot be read
|   |-- EditError              a saved edit that cannot be read, or one made for another model
|   `-- LinkError              a page address with unusable values
|-- ModelError                 exit status 2
|   |-- ModelNotFound          unknown or private id, folder that does not exist
|   |-- ModelGated             licence must be accepted, token missing
|   |-- RevisionNotFound
|   |-- NetworkUnavailable     no answer, server error, rate limit
|   |-- ModelNotCached         offline mode and not in the cache
|   |-- ModelUnsupported       not a causal decoder, unknown architecture, needs remote code
|   |-- ModelFilesError        pickle only, missing tensors, damaged weights or config, no tokenizer
|   `-- ModelTooLarge          the memory estimate exceeds what is free
|-- CapabilityError            the model lacks what the experiment needs; exit status 2
`-- Cancelled                  the run was stopped by its owner; exit status 3
"""

from __future__ import annotations


class FactScopeError(Exception):
    """A failure with a sentence for the user.

    Args:
        what: the offending value and why it cannot be used, as one clause without a final stop.
        try_: what to do instead, as one clause without a final stop; a question ends in its mark.
    """

    exit_status = 2

    def __init__(self, what: str, try_: str = "") -> None:
        self.what = what
        self.try_ = try_
        sentence = f"{what}; {try_}" if try_ else what
        super().__init__(sentence if sentence.endswith("?") else f"{sentence}.")


class InputError(FactScopeError):
    """What the user typed cannot be used."""


class PromptError(InputError):
    """The prompt is empty, too long or not text."""


class SubjectError(InputError):
    """The subject is missing from the prompt, occurs several times, or covers no token."""


class TargetError(InputError):
    """The answer or the foil cannot be a target."""


class SpecError(InputError):
    """A parameter of an experiment is out of range."""


class DatasetError(InputError):
    """A file of facts cannot be read."""


class EditError(InputError):
    """An edit is damaged, made for another model, or out of this one's range."""


class LinkError(InputError):
    """A page address carries values that cannot be used."""


class ModelError(FactScopeError):
    """A model cannot be loaded."""


class ModelNotFound(ModelError):
    """No such id for this user, or no such folder."""


class ModelGated(ModelError):
    """The model's licence must be accepted first, with a token."""


class RevisionNotFound(ModelError):
    """The model exists, the revision does not."""


class NetworkUnavailable(ModelError):
    """The hub did not answer, or answered with a server error."""


class ModelNotCached(ModelError):
    """Offline mode is on and the model is not in the local cache."""


class ModelUnsupported(ModelError):
    """Not a causal decoder, an unknown architecture, or one that needs remote code."""


class ModelFilesError(ModelError):
    """The folder or repository holds files that cannot be used."""


class ModelTooLarge(ModelError):
    """The memory estimate exceeds what is free."""


class CapabilityError(FactScopeError):
    """The loaded model lacks something that the experiment needs."""


class Cancelled(FactScopeError):
    """The run was stopped; what was finished is kept by whoever watched the progress."""

    exit_status = 3

    def __init__(self, what: str = "the run was cancelled", try_: str = "") -> None:
        super().__init__(what, try_)
