"""Tools that know neither WeChat nor NATS: time, tasks, fair shares, retries after a crash, a web server."""
