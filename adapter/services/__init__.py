"""What is answered on `wechat.svc`."""
