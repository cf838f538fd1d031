// A service that tells a user something and waits until it is known what became of it: send SANDBOX TEXT
//
// Each receipt is a line. Exit code 0 only for accepted.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/nats-io/nats.go"
)

const tooManyRequests = 10167

type outbound struct {
	ID      string `json:"id"`
	Sandbox string `json:"sandbox"`
	Text    string `json:"text"`
}

type receipt struct {
	Command    string   `json:"command"`
	Outcome    string   `json:"outcome"`
	Reason     string   `json:"reason"`
	MessageIDs []string `json:"message_ids"`
}

func main() {
	sandbox, text := os.Args[1], os.Args[2]
	command := outbound{ID: fmt.Sprintf("%s.send.%x", sandbox, time.Now().UnixNano()), Sandbox: sandbox, Text: text}
	url := os.Getenv("NATS_URL")
	if url == "" {
		url = nats.DefaultURL
	}
	nc, err := nats.Connect(url, inboxPrefix("_INBOX"), nats.MaxReconnects(-1))
	if err != nil {
		log.Fatal(err)
	}
	receipts, err := nc.SubscribeSync("wechat.event." + sandbox + ".receipt.*")
	if err != nil {
		log.Fatal(err)
	}
	if err := nc.Flush(); err != nil { // listen before you speak
		log.Fatal(err)
	}
	js, err := nc.JetStream()
	if err != nil {
		log.Fatal(err)
	}
	body, err := json.Marshal(command)
	if err != nil {
		log.Fatal(err)
	}
	for {
		_, err := js.Publish("wechat.out", body, nats.MsgId(command.ID))
		if err == nil {
			break
		}
		if !passes(err) {
			log.Fatal(err)
		}
		time.Sleep(time.Second) // not confirmed: once more, with the same id
	}
	for {
		msg, err := receipts.NextMsg(time.Minute)
		if errors.Is(err, nats.ErrTimeout) {
			continue
		}
		if err != nil {
			log.Fatal(err)
		}
		var got receipt
		if err := json.Unmarshal(msg.Data, &got); err != nil {
			log.Fatal(err)
		}
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

// passes says whether a publish may be repeated, with the same id: it was not confirmed, or not stored since others send
// more than the stream takes in.
func passes(err error) bool {
	var refused *nats.APIError
	if errors.As(err, &refused) {
		return refused.ErrorCode == tooManyRequests
	}
	return errors.Is(err, nats.ErrTimeout) || errors.Is(err, nats.ErrNoStreamResponse) || errors.Is(err, nats.ErrNoResponders)
}

// inboxPrefix says where answers come back. With permissions each role has a place of its own.
func inboxPrefix(otherwise string) nats.Option {
	if prefix := os.Getenv("NATS_INBOX_PREFIX"); prefix != "" {
		return nats.CustomInboxPrefix(prefix)
	}
	return nats.CustomInboxPrefix(otherwise)
}
