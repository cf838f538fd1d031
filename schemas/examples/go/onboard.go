package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

type login struct {
	Login      string `json:"login"`
	Status     string `json:"status"`
	Reason     string `json:"reason"`
	Detail     string `json:"detail"`
	Code       *int   `json:"code"` // absent: 1
	QRCodeText string `json:"qrcode_text"`
}

// onboard is a platform that gives a sandbox its WeChat user:
//
//	onboard login SANDBOX       shows a QR code; digits that the phone shows are typed here
//	onboard bind SANDBOX BOT    a bot that you have; its token is in the environment, as BOT_TOKEN
//
// Exit code 0 once the bot is bound.
func onboard(arguments []string) {
	nc := connect("_INBOX")
	ok := false
	switch {
	case len(arguments) == 2 && arguments[0] == "login":
		ok = logIn(nc, arguments[1])
	case len(arguments) == 3 && arguments[0] == "bind":
		ok = bind(nc, arguments[1], arguments[2])
	}
	if !ok {
		os.Exit(1)
	}
}

func logIn(nc *nats.Conn, sandbox string) bool {
	events, err := nc.SubscribeSync("wechat.event." + sandbox + ".login")
	must(err)
	typed := bufio.NewReader(os.Stdin)
	now := ask(nc, "login.start", map[string]any{"sandbox": sandbox})
	code, shown := 0, ""
	for {
		newest := 1
		if now.Code != nil {
			newest = *now.Code
		}
		if now.QRCodeText != "" && newest != code && now.Status == "wait" {
			code = newest               // a code lives for a minute or two; a new one has a higher number
			fmt.Println(now.QRCodeText) // a secret: who scans it first gets the sandbox
		}
		if state := strings.TrimSpace(now.Status + " " + now.Reason); state != shown {
			shown = state
			fmt.Printf("%s: %s\n", state, now.Detail)
		}
		switch now.Status {
		case "confirmed", "already_bound":
			return true
		case "expired", "failed", "cancelled", "lost":
			return false
		case "need_verify_code":
			if now.Reason != "checking" {
				line, err := typed.ReadString('\n')
				must(err)
				now = ask(nc, "login.verify", map[string]any{"login": now.Login, "code": strings.TrimSpace(line)})
				continue
			}
		}
		if _, err := events.NextMsg(3 * time.Second); err != nil && err != nats.ErrTimeout {
			log.Fatal(err) // an event may get lost; the status does not
		}
		now = ask(nc, "login.status", map[string]any{"login": now.Login})
	}
}

func bind(nc *nats.Conn, sandbox, bot string) bool {
	inbox := nc.NewInbox()
	answers, err := nc.SubscribeSync(inbox)
	must(err)
	msg := message("wechat.bind."+sandbox, map[string]any{
		"id": "bind." + inbox, "bot": bot, "bot_token": os.Getenv("BOT_TOKEN"),
	})
	msg.Header.Set("Reply-To", inbox)
	store(nc, msg)
	got, err := answers.NextMsg(time.Minute)
	must(err) // the bind is stored all the same
	var receipt struct{ Outcome, Detail string }
	must(json.Unmarshal(got.Data, &receipt))
	if receipt.Outcome != "applied" {
		fmt.Println(receipt.Detail)
		return false
	}
	fmt.Println("bound")
	return true
}

// ask asks any adapter; ends the program with the sentence that it answers instead.
func ask(nc *nats.Conn, verb string, request map[string]any) login {
	body, err := json.Marshal(request)
	must(err)
	msg, err := nc.Request("wechat.svc."+verb, body, 20*time.Second)
	must(err)
	if text := msg.Header.Get("Nats-Service-Error"); text != "" {
		log.Fatal(text)
	}
	var now login
	must(json.Unmarshal(msg.Data, &now))
	return now
}
