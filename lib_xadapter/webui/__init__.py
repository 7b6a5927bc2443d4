"""The AUTOMATIC1111 WebUI as host: the only place that knows `modules.*`."""
