"""Where the WebUI finds X-Adapter."""

import logging

from lib_xadapter.host_modules import why_off

if reason := why_off():
    logging.getLogger("lib_xadapter").error(reason)
else:
    from lib_xadapter.webui.plots.compare import XAdapterCompare
    from lib_xadapter.webui.script import XAdapter, register

    __all__ = ["XAdapter", "XAdapterCompare"]

    register()
