"""Where the WebUI finds X-Adapter."""

from lib_xadapter.webui.plots.compare import XAdapterCompare
from lib_xadapter.webui.script import XAdapter, register

__all__ = ["XAdapter", "XAdapterCompare"]

register()
