"""Tools that know nothing of WeChat or NATS: time, tasks, fair shares, repeats after a crash, a web server."""
