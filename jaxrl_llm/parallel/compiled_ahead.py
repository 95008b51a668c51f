"""A program that a thread compiles while the process does something else; the compiler releases Python's lock."""

import ctypes
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from jaxrl_llm.types import PyTree


class CompiledAhead:
    """A jitted function that is called with arguments of one shape."""

    def __init__(self, program: Callable, *args: PyTree):
        """
        Args:
            program: the jitted function, or any function that is never started.
            args: shapes, dtypes and shardings of its arguments.
        """
        self._program, self._args = program, args
        self._compiled: Future | None = None

    def start(self) -> None:
        """Start to compile. The process does not end before the compiler has."""
        if self._compiled is None:
            thread = ThreadPoolExecutor(1, thread_name_prefix="compile")
            self._compiled = thread.submit(self._compile)
            thread.shutdown(wait=False)

    def _compile(self) -> Callable:
        compiled = self._program.lower(*self._args).compile()
        give_back_memory()
        return compiled

    def ready(self) -> Callable:
        """Return the compiled program, waiting for it, or raise what the compiler raised; without `start`, the jitted function."""
        return self._program if self._compiled is None else self._compiled.result()


def give_back_memory() -> None:
    """Give memory that a compiler has freed back to the system. glibc would keep hundreds of megabytes of it in the process."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def abstract(tree: PyTree) -> PyTree:
    """Return shapes, dtypes and shardings of a tree of arrays or of `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
