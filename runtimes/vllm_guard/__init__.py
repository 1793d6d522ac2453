"""The exact guard inside vLLM: its verdict on each image comes with the answer, out of the prefill that answers.

``python -m runtimes.vllm`` starts a server with it. By hand: ``--kv-transfer-config`` names ``SafeVLMGuard``, which
vLLM finds through the entry point ``vllm.general_plugins`` of this package.

What is imported in vLLM's processes needs torch, safetensors and transformers, which vLLM brings, and no other library
of ours. :mod:`.head` is the guard, :mod:`.requests` which images a step completes, :mod:`.storage` the way of a verdict
from worker to scheduler, :mod:`.verdict` what is said of a request, and :mod:`.connector` what vLLM calls.
"""

from __future__ import annotations

from runtimes.vllm_guard.versions import api_problem

__all__ = ["CONNECTOR", "CONNECTOR_MODULE", "register"]

CONNECTOR = "SafeVLMGuard"
"""The name to give as ``kv_connector``, and the class's."""
CONNECTOR_MODULE = "runtimes.vllm_guard.connector"


def register() -> None:
    """Make the connector known to vLLM by its name; called by vLLM in each of its processes, any number of times.

    A vLLM without the connector API is left as it is: it may serve without the guard, and names no such connector.
    """
    if api_problem() is not None:
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, CONNECTOR_MODULE, CONNECTOR)
