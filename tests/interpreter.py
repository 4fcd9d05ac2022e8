"""Whether Triton's interpreter, which runs the Triton kernels where there is no GPU, can run them here."""

try:
    import triton
    import triton.language as tl
except ImportError:  # the backend's own status says so
    triton = None


if triton:

    @triton.jit
    def _loop(count):
        for _ in tl.range(count):
            pass


def missing() -> str | None:
    """Why the interpreter can't run a kernel's loop, or None if it can."""
    if triton is None:
        return None
    try:
        _loop[(1,)](2)
    except triton.runtime.errors.InterpreterError as error:
        return (
            f"the interpreter of Triton {triton.__version__} fails at a kernel's loop ({error}): "
            "that of Triton 3.6 (PyTorch 2.11) needs NumPy below 2.4"
        )
    return None
