"""The requests on `wechat.svc`."""
