// An agent that answers each message with the same words: echo SANDBOX
//
// Bind the sandbox with the option durable: what its user wrote then waits in its consumer while nobody runs.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

const tooManyRequests = 10167

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
	User    string `json:"user"`
	Text    string `json:"text"`
	ReplyTo string `json:"reply_to"`
}

func main() {
	sandbox := os.Args[1]
	url := os.Getenv("NATS_URL")
	if url == "" {
		url = nats.DefaultURL
	}
	// The only inboxes that a sandbox may be permitted.
	nc, err := nats.Connect(url, inboxPrefix("_INBOX_"+sandbox), nats.MaxReconnects(-1))
	if err != nil {
		log.Fatal(err)
	}
	js, err := nc.JetStream()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("echo agent of %s: ready\n", sandbox)
	// Asks for the next message; within 30 s there is one, or the word that there is none. In plain NATS, since a
	// sandbox need not be permitted anything else of JetStream.
	inbox := nc.NewInbox()
	pulled, err := nc.SubscribeSync(inbox)
	if err != nil {
		log.Fatal(err)
	}
	ask := []byte(`{"batch":1,"expires":30000000000}`)
	for {
		if err := nc.PublishRequest("$JS.API.CONSUMER.MSG.NEXT.WECHAT_IN."+sandbox, inbox, ask); err != nil {
			log.Fatal(err)
		}
		msg, err := pulled.NextMsg(35 * time.Second)
		if errors.Is(err, nats.ErrNoResponders) {
			time.Sleep(time.Second) // not bound yet
			continue
		}
		if err != nil {
			continue // NATS was away
		}
		if msg.Header.Get("Status") != "" {
			continue // nothing was said
		}
		var said inbound
		if err := json.Unmarshal(msg.Data, &said); err != nil {
			log.Fatal(err)
		}
		store(js, "wechat.out."+sandbox, answer(sandbox, said))
		// A crash before this line brings the message again, and the id keeps its answer single.
		if err := nc.Publish(msg.Reply, []byte("+ACK")); err != nil {
			log.Fatal(err)
		}
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

// store publishes until the stream has confirmed. The id makes the repeats one.
func store(js nats.JetStreamContext, subject string, command outbound) {
	body, err := json.Marshal(command)
	if err != nil {
		log.Fatal(err)
	}
	for {
		_, err := js.Publish(subject, body, nats.MsgId(command.ID))
		if err == nil {
			return
		}
		if !passes(err) {
			log.Fatal(err)
		}
		time.Sleep(time.Second)
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
