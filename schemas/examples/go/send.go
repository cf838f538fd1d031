package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/nats-io/nats.go"
)

type receipt struct {
	Command    string   `json:"command"`
	Outcome    string   `json:"outcome"`
	Reason     string   `json:"reason"`
	MessageIDs []string `json:"message_ids"`
}

// send is a service that tells a user something and waits until it is known what became of it. Each receipt is a line.
// Exit code 0 only for accepted.
func send(sandbox, text string) {
	command := outbound{ID: fmt.Sprintf("%s.send.%x", sandbox, time.Now().UnixNano()), Sandbox: sandbox, Text: text}
	nc := connect("_INBOX")
	receipts, err := nc.SubscribeSync("wechat.event." + sandbox + ".receipt.>")
	must(err)
	must(nc.Flush()) // listen before you speak
	store(nc, message("wechat.out", command))
	for {
		msg, err := receipts.NextMsg(time.Minute)
		if errors.Is(err, nats.ErrTimeout) {
			continue
		}
		must(err)
		var got receipt
		must(json.Unmarshal(msg.Data, &got))
		if got.Command != command.ID {
			continue
		}
		fmt.Println(got.Outcome, got.Reason, got.MessageIDs)
		switch got.Outcome {
		case "parked": // not final: it waits for the user
		case "accepted":
			return
		default:
			os.Exit(1)
		}
	}
}
