"""The edge towards Tencent's iLink: its JSON (wire), its rules (protocol, translate), its HTTP (client)."""
