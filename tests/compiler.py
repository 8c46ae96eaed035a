"""How tests compile: they compile more than they compute."""

import importlib.metadata

# Programs are small: in one piece they compile a quarter faster than cut into 32.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later compilers have no choice of emitters
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # the older ones take half the time
# Devices share the cores of a machine that may be busy: a collective that waits for its last one is not stuck.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"


def flags(devices: int = 1) -> str:
    """XLA_FLAGS of a process with so many fake devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK} {PATIENT}"


class Uncompiled:
    """In place of a compiled program: that of which it would be made."""

    def __init__(self, lowered):
        self.lowered = lowered

    def memory_analysis(self):
        return None


def leave_out(patch) -> None:
    """What is compiled ahead of time stays lowered: for what is set up only to be looked at."""
    import jax

    patch.setattr(jax.stages.Lowered, "compile", lambda self, *_, **__: Uncompiled(self))
