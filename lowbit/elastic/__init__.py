# The plug-in, which is imported as soon as transformers is, imports files of this room: let none be half done by then.
import transformers.modeling_utils  # noqa: F401
