"""What differs between the kinds of FAISS index: how to make, fill and search one.

The only file that imports faiss.
"""

from functools import lru_cache
from importlib import import_module, metadata
from typing import Any

import numpy as np

_KMEANS_ITERATIONS = 10
_KMEANS_POINTS_PER_LIST = 64
_ADD_ROWS = 65_536
GPU_MAX_K = 2048
_GPU_DISTRIBUTIONS = ("faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cu13", "faiss-gpu-cuvs")


@lru_cache
def faiss_module() -> Any:
    """Import faiss, after torch: in the other order their OpenMP libraries can clash.

    Returns:
        The module.

    Raises:
        ImportError: faiss is not installed, or is installed twice.
    """
    gpu = [name for name in _GPU_DISTRIBUTIONS if _is_installed(name)]
    if _is_installed("faiss-cpu") and gpu:
        raise ImportError(
            f"faiss-cpu and {gpu[0]} are both installed and overwrite each other's files; "
            f"remove both (pip uninstall faiss-cpu {' '.join(gpu)}), then install the one you want"
        )
    try:
        import_module("torch")
        return import_module("faiss")
    except ImportError as error:
        raise ImportError("searching needs FAISS: pip install 'motionrag[cpu]' (or 'motionrag[gpu]')") from error


def trained(vectors: np.ndarray, factory: str) -> Any:
    """Make and train an empty inner-product index.

    Args:
        vectors: (n, d) float32, what it is to hold.
        factory: FAISS factory string.

    Returns:
        A FAISS index without vectors.

    Raises:
        ValueError: FAISS cannot read the string, or cannot train it on so few vectors, or it makes a kind that this
            library does not search.
    """
    faiss = faiss_module()
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS cannot make an index of {factory!r} in {vectors.shape[1]} dimensions: {error}"
        ) from None
    core = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    searchable = (faiss.IndexIVF, faiss.IndexHNSW, faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexPQ)
    if not isinstance(core, searchable):
        raise ValueError(f"index kind {factory!r} is not supported; use a Flat, IVF, HNSW, SQ or PQ index")
    if isinstance(core, faiss.IndexIVF):
        core.cp.niter = _KMEANS_ITERATIONS
        core.cp.max_points_per_centroid = _KMEANS_POINTS_PER_LIST
    try:
        index.train(vectors)
    except RuntimeError as error:
        raise ValueError(f"{len(vectors)} vectors are too few to train {factory!r}: {error}") from None
    if isinstance(core, faiss.IndexIVF):
        core.make_direct_map()  # to look vectors up by position
    return index


def add(index: Any, vectors: np.ndarray) -> None:
    """Append vectors to an index that lies in memory of its own (adding to a mapped one aborts the process)."""
    for start in range(0, len(vectors), _ADD_ROWS):
        index.add(np.ascontiguousarray(vectors[start : start + _ADD_ROWS]))


def keeps_vectors(index: Any) -> bool:
    """Whether an index gives back the vectors it was given, bit for bit."""
    faiss = faiss_module()
    return isinstance(index, (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexHNSWFlat))


def efforts(index: Any) -> list[int]:
    """Settings of search effort to try, rising; [0] for kinds that have none."""
    faiss = faiss_module()
    if isinstance(index, faiss.IndexPreTransform):
        return efforts(faiss.downcast_index(index.index))
    if isinstance(index, faiss.IndexIVF):
        return sorted({min(round(2 ** (step / 2)), index.nlist) for step in range(34)})
    if isinstance(index, faiss.IndexHNSW):
        return [16, 32, 64, 128, 256, 512, 1024]
    return [0]


def parameters(index: Any, selector: Any | None, effort: int, k: int) -> Any:
    """Search parameters for one call: the index itself is never changed, as other threads may be searching it.

    Args:
        index: a FAISS index.
        selector: a FAISS IDSelector, or None.
        effort: one of `efforts`.
        k: how many results are wanted.

    Returns:
        A FAISS SearchParameters, or None where there is nothing to set.
    """
    faiss = faiss_module()
    if isinstance(index, faiss.IndexPreTransform):
        inner = parameters(faiss.downcast_index(index.index), selector, effort, k)
        return faiss.SearchParametersPreTransform(index_params=inner)
    given = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexPQ):
        return faiss.SearchParametersPQ(**given)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=max(effort, k), **given)
    if hasattr(index, "nprobe"):  # IndexIVF, and its copy on a GPU
        return faiss.SearchParametersIVF(nprobe=effort, **given)
    return faiss.SearchParameters(**given) if given else None


def to_gpu(index: Any) -> tuple[Any, Any] | None:
    """Copy an index to the first GPU.

    Args:
        index: a FAISS index.

    Returns:
        The resources, which must live as long as the copy, and the copy; None without a GPU, or for a kind that is
        not searched there.
    """
    faiss = faiss_module()
    if faiss.get_num_gpus() == 0 or not isinstance(index, (faiss.IndexFlat, faiss.IndexIVFFlat)):
        return None
    resources = faiss.StandardGpuResources()
    return resources, faiss.index_cpu_to_gpu(resources, 0, index)


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
