"""Where the WebUI finds X-Adapter."""

import logging

from lib_xadapter.host_modules import missing, why_off

if names := missing():
    logging.getLogger("lib_xadapter").error(why_off(names))
else:
    from lib_xadapter.webui.plots.compare import XAdapterCompare
    from lib_xadapter.webui.script import XAdapter, register

    __all__ = ["XAdapter", "XAdapterCompare"]

    register()
