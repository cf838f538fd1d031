package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

type inbound struct {
	ID    string `json:"id"`
	User  string `json:"user"`
	Text  string `json:"text"`
	Items []struct {
		Kind string `json:"kind"`
	} `json:"items"`
}

type outbound struct {
	ID      string `json:"id"`
	Sandbox string `json:"sandbox,omitempty"`
	User    string `json:"user,omitempty"`
	Text    string `json:"text"`
	ReplyTo string `json:"reply_to,omitempty"`
}

// echo is an agent that answers each message with the same words. Bind the sandbox with the option durable: what its
// user wrote then waits in its consumer while nobody runs.
func echo(sandbox string) {
	_, js := connect("_INBOX_" + sandbox) // the only inboxes that a sandbox may be permitted
	fmt.Printf("echo agent of %s: ready\n", sandbox)
	consumer, err := js.Consumer(context.Background(), "WECHAT_IN", sandbox)
	for ; err != nil; consumer, err = js.Consumer(context.Background(), "WECHAT_IN", sandbox) {
		time.Sleep(time.Second) // not bound yet
	}
	for {
		msg, err := consumer.Next(jetstream.FetchMaxWait(30 * time.Second))
		if errors.Is(err, nats.ErrTimeout) {
			continue // nothing was said
		}
		if err != nil {
			time.Sleep(time.Second)
			continue
		}
		var said inbound
		must(json.Unmarshal(msg.Data(), &said))
		command := answer(sandbox, said)
		store(js, "wechat.out."+sandbox, command, command.ID)
		must(msg.Ack()) // a crash before this line brings the message again, and the id keeps its answer single
		fmt.Println("answered", said.ID)
	}
}

// answer makes the command. Its id follows from what caused it; it names the user, since another may be bound by now.
func answer(sandbox string, said inbound) outbound {
	text := "You said: " + said.Text
	if said.Text == "" {
		var kinds []string
		for _, item := range said.Items {
			kinds = append(kinds, item.Kind)
		}
		text = "You sent: " + strings.Join(kinds, ", ")
	}
	return outbound{ID: sandbox + ".echo." + said.ID, User: said.User, Text: text, ReplyTo: said.ID}
}
