"""What is answered on `wechat.svc`, logins apart."""
