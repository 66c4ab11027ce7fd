"""How Numba makes a kernel of functions that call one another: as one piece, optimised once.

By itself Numba optimises each function, then what calls it with the function in it, quickly and then thoroughly, and so
on up to the kernel; and it makes machine code of each, with wrappers to call it from Python, which nobody does.
"""

from typing import Any

import llvmlite.binding as llvm
from numba.core import codegen, compiler

from convdispatch.memory import CACHE_LINE


class _Whole(codegen.JITCodeLibrary):
    """A function that is optimised and made into machine code once all that it calls is there."""

    def add_ir_module(self, ir_module: Any) -> None:
        """Add a part, whose stack begins at a cache line.

        Else vectors that no register is left for may lie across two lines: by where a thread's stack happens to begin,
        loops that store and load such vectors took half as long again.
        """
        for function in ir_module.functions:
            if not function.is_declaration:
                function.attributes.alignstack = CACHE_LINE
                function.attributes.add("nounwind")  # true, and llvmlite forgets an alignment that stands alone
        super().add_ir_module(ir_module)  # type: ignore[no-untyped-call]

    def _optimize_functions(self, ll_module: Any) -> None:
        """Make a part ready to be linked, as it is."""
        ll_module.data_layout = self._codegen._data_layout  # noqa: SLF001

    def _optimize_final_module(self) -> None:
        """Optimise all parts together."""
        made: Any = self._codegen
        manager, builder = made._module_pass_manager()  # noqa: SLF001
        manager.run(self._final_module, builder)


class _Ingredient(_Whole):
    """A function that is only ever a part of others: no machine code is made of it, which nobody would run."""

    def _optimize_final_module(self) -> None:
        """Do nothing: that is done with what it is a part of."""

    def _finalize_final_module(self) -> None:
        """Make of all that this has only the variable whose address Numba asks for at once."""
        names = [value.name for value in self._final_module.global_variables if value.name.startswith("_ZN08NumbaEnv")]
        variables = "".join(f'@"{name}" = common global i64 0\n' for name in names)
        engine: Any = self._codegen._engine  # noqa: SLF001
        engine.add_module(llvm.parse_assembly(variables))
        self._finalized = True


class _Apart(_Ingredient):
    """One that stays a function of its own."""

    def add_ir_module(self, ir_module: Any) -> None:
        """Add what is never to be put into its caller."""
        for function in ir_module.functions:
            if not function.is_declaration:
                function.attributes.add("noinline")
        super().add_ir_module(ir_module)


class WholeCompiler(compiler.Compiler):
    """Numba's compiler with its own pipelines, for what is compiled by itself."""

    library: Any = _Whole

    def define_pipelines(self) -> Any:
        """Return Numba's own pipelines."""
        self.state.library = self.library(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        self.state.library.enable_object_caching()
        return super().define_pipelines()  # type: ignore[no-untyped-call]


class IngredientCompiler(WholeCompiler):
    """The compiler of what is a part of others."""

    library = _Ingredient


class ApartCompiler(WholeCompiler):
    """The compiler of what is a part of others and stays a function."""

    library = _Apart
