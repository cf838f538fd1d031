package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

type inbound struct {
	ID    string `json:"id"`
	User  string `json:"user"`
	Text  string `json:"text"`
	Items []item `json:"items"`
}

type item struct {
	Kind  string `json:"kind"`
	Media *struct {
		Object string `json:"object"`
	} `json:"media"`
}

type outbound struct {
	ID      string `json:"id"`
	Sandbox string `json:"sandbox,omitempty"`
	User    string `json:"user,omitempty"`
	Text    string `json:"text"`
	ReplyTo string `json:"reply_to,omitempty"`
}

type nextPage struct {
	Reader   uint64 `json:"reader"`
	Messages []struct {
		Position string  `json:"position"`
		Message  inbound `json:"message"`
	} `json:"messages"`
}

type agent struct {
	nc      *nats.Conn
	sandbox string
}

// echo is an agent that answers each message with the same words, or with what it has got. What its user wrote while
// nobody ran waits in the sandbox's inbox.
func echo(sandbox string) {
	me := agent{connect("_INBOX_" + sandbox), sandbox} // the only inboxes that a sandbox may be permitted
	rung := make(chan struct{}, 1)
	_, err := me.nc.Subscribe("wechat.in."+sandbox, func(*nats.Msg) {
		select {
		case rung <- struct{}{}:
		default: // it has rung already
		}
	})
	must(err)
	fmt.Printf("echo agent of %s: ready\n", sandbox)
	request := map[string]any{} // the first one makes this program the sandbox's only reader
	for {
		answered, err := me.ask("next", request)
		if err != nil {
			log.Fatal(err) // such as: another program reads the sandbox now
		}
		var page nextPage
		must(json.Unmarshal(answered.Data, &page))
		request = map[string]any{"reader": page.Reader}
		for _, handed := range page.Messages {
			store(me.nc, message("wechat.out."+sandbox, me.answer(handed.Position, handed.Message)))
			// The next request confirms it. A crash before brings the message again, and the id keeps its answer single.
			request["after"] = handed.Position
			fmt.Println("answered", handed.Message.ID)
		}
		if len(page.Messages) == 0 {
			select {
			case <-rung:
			case <-time.After(30 * time.Second): // a ring may get lost
			}
		}
	}
}

// answer makes the command. Its id follows from what caused it; it names the user, since another may be bound by now.
func (me agent) answer(position string, said inbound) outbound {
	text := "You said: " + said.Text
	if said.Text == "" {
		var items []string
		for _, item := range said.Items {
			items = append(items, me.described(position, item))
		}
		text = "You sent: " + strings.Join(items, ", ")
	}
	return outbound{ID: me.sandbox + ".echo." + said.ID, User: said.User, Text: text, ReplyTo: said.ID}
}

func (me agent) described(position string, item item) string {
	if item.Media == nil {
		return item.Kind
	}
	data, err := me.read(position, item.Media.Object)
	if err != nil {
		return fmt.Sprintf("%s (%v)", item.Kind, err)
	}
	return fmt.Sprintf("%s (%d bytes)", item.Kind, len(data))
}

// read returns the bytes of an object, which may still be on their way from WeChat. The error says why there are none.
func (me agent) read(position string, object string) ([]byte, error) {
	var data []byte
	for after := 0; ; {
		request := map[string]any{"object": object, "position": position, "wait_s": 10, "after": after}
		piece, err := me.ask("media.get", request)
		if err != nil {
			return nil, err
		}
		data = append(data, piece.Data...)
		next := piece.Header.Get("Wechat-Next")
		if next == "" {
			if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != piece.Header.Get("Wechat-Sha256") {
				return nil, errors.New("the bytes are not those that were stored")
			}
			return data, nil
		}
		after, err = strconv.Atoi(next)
		must(err)
	}
}

// ask asks until an adapter answers. The error is the sentence that it answers instead.
func (me agent) ask(verb string, request any) (*nats.Msg, error) {
	body, err := json.Marshal(request)
	must(err)
	for ; ; time.Sleep(time.Second) { // no adapter is there, or it has no time
		answered, err := me.nc.Request("wechat.svc."+verb+"."+me.sandbox, body, 15*time.Second)
		switch {
		case errors.Is(err, nats.ErrTimeout), errors.Is(err, nats.ErrNoResponders):
			continue
		case err != nil:
			return nil, err
		}
		switch answered.Header.Get("Nats-Service-Error-Code") {
		case "":
			return answered, nil
		case "429", "503":
		default:
			return nil, errors.New(answered.Header.Get("Nats-Service-Error"))
		}
	}
}
