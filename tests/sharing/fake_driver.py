"""A driver for GPUs that are not there, with the functions of ``cuda.bindings.driver``.

Like the real one it starts every split at the first SM, so that two splits share SMs.
"""

from enum import IntEnum
from types import SimpleNamespace


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_INVALID_RESOURCE_TYPE = 914
    CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION = 915


class CUdevResourceType(IntEnum):
    CU_DEV_RESOURCE_TYPE_SM = 1


class CUgreenCtxCreate_flags(IntEnum):  # noqa: N801
    CU_GREEN_CTX_DEFAULT_STREAM = 1


class CUstream_flags(IntEnum):  # noqa: N801
    CU_STREAM_NON_BLOCKING = 1


ENUMS = (CUresult, CUdevResourceType, CUgreenCtxCreate_flags, CUstream_flags)
FUNCTIONS = (
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGet",
    "cuDeviceGetDevResource",
    "cuDevSmResourceSplitByCount",
    "cuDevResourceGenerateDesc",
    "cuGreenCtxCreate",
    "cuGreenCtxGetDevResource",
    "cuGreenCtxDestroy",
    "cuGreenCtxStreamCreate",
    "cuStreamGetGreenCtx",
    "cuStreamDestroy",
)


class NoDriverError(RuntimeError):
    """Stands for DynamicLibNotFoundError of cuda.pathfinder."""


class FakeDriver:
    """One GPU.

    Args:
        num_sms: Its SMs.
        least: Smallest size of a group; 0 is a driver that does not say.
        multiple: What a group's size is a multiple of.
        version: CUDA of the driver; None is no driver.
        max_groups: Groups that it can make, if clusters of SMs allow fewer than there are SMs for.
        fails: Results of functions that fail, by name and number of the call, from 1.
        missing: Functions that the bindings do not have.
        short: SMs that contexts have less than they were asked to have.
    """

    CUdevResourceType = CUdevResourceType
    CUgreenCtxCreate_flags = CUgreenCtxCreate_flags
    CUstream_flags = CUstream_flags

    def __init__(
        self,
        *,
        num_sms=132,
        least=8,
        multiple=8,
        version=13000,
        max_groups=99,
        fails=(),
        missing=(),
        short=0,
    ):
        self.num_sms, self.least, self.multiple = num_sms, least, multiple
        self.version = version
        self.max_groups, self.fails, self.short = max_groups, dict(fails), short
        self.missing = missing
        self.called = []
        self.contexts, self.streams = {}, {}

    def __getattr__(self, name):
        if name not in FUNCTIONS or name in self.missing:
            raise AttributeError(name)
        return lambda *arguments: self._call(name, *arguments)

    def _call(self, name, *arguments):
        if self.version is None:
            raise NoDriverError("the CUDA driver is\nnot there")
        self.called.append((name, *arguments))
        code = self.fails.get((name, self.names().count(name)), 0)
        if code:
            return (CUresult(code), None)
        values = getattr(self, f"_{name}")(*arguments)
        return (CUresult.CUDA_SUCCESS, *values)

    def names(self):
        return [name for name, *_ in self.called]

    def sms_of(self, handle):
        """SMs on which a stream runs."""
        return self.contexts[self.streams[handle]]

    def _resource(self, sms, split):
        fields = SimpleNamespace(
            smCount=len(sms),
            minSmPartitionSize=self.least,
            smCoscheduledAlignment=self.multiple,
        )
        return SimpleNamespace(sm=fields, sms=frozenset(sms), split=split)

    def _cuInit(self, flags):  # noqa: N802
        return ()

    def _cuDriverGetVersion(self):  # noqa: N802
        return (self.version,)

    def _cuDeviceGet(self, ordinal):  # noqa: N802
        return (ordinal,)

    def _cuDeviceGetDevResource(self, device, kind):  # noqa: N802
        return (self._resource(range(self.num_sms), None),)

    def _cuDevSmResourceSplitByCount(self, num_groups, source, flags, least):  # noqa: N802
        multiple = self.multiple or 1
        size = max(self.least, -(-least // multiple) * multiple)
        made = min(num_groups, source.sm.smCount // size, self.max_groups)
        split = len(self.called)
        groups = [self._resource(range(i * size, (i + 1) * size), split) for i in range(made)]
        return groups, made, self._resource(range(made * size, self.num_sms), split)

    def _cuDevResourceGenerateDesc(self, resources, count):  # noqa: N802
        assert len(resources) == count
        assert len({resource.split for resource in resources}) == 1
        return (frozenset().union(*(resource.sms for resource in resources)),)

    def _cuGreenCtxCreate(self, descriptor, device, flags):  # noqa: N802
        assert flags == CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        context = 1000 + len(self.called)
        self.contexts[context] = descriptor
        return (context,)

    def _cuGreenCtxGetDevResource(self, context, kind):  # noqa: N802
        return (self._resource(sorted(self.contexts[context])[self.short :], None),)

    def _cuGreenCtxStreamCreate(self, context, flags, priority):  # noqa: N802
        assert flags == CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = 2000 + len(self.called)
        self.streams[stream] = context
        return (stream,)

    def _cuStreamGetGreenCtx(self, stream):  # noqa: N802
        return (self.streams[stream],)

    def _cuStreamDestroy(self, stream):  # noqa: N802
        del self.streams[stream]
        return ()

    def _cuGreenCtxDestroy(self, context):  # noqa: N802
        assert context not in self.streams.values(), "its streams go first"
        del self.contexts[context]
        return ()
