// Programs to start from: echo SANDBOX | send SANDBOX TEXT | onboard login SANDBOX | onboard bind SANDBOX BOT
package main

import (
	"context"
	"encoding/json"
	"errors"
	"log"
	"os"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const tooManyRequests = 10167

func main() {
	arguments := os.Args[1:]
	switch {
	case len(arguments) == 2 && arguments[0] == "echo":
		echo(arguments[1])
	case len(arguments) == 3 && arguments[0] == "send":
		send(arguments[1], arguments[2])
	case len(arguments) > 2 && arguments[0] == "onboard":
		onboard(arguments[1:])
	default:
		log.Fatal("usage: echo SANDBOX | send SANDBOX TEXT | onboard login SANDBOX | onboard bind SANDBOX BOT")
	}
}

// connect connects to NATS_URL, as README.md says; answers come back below NATS_INBOX_PREFIX, else the prefix.
func connect(prefix string) (*nats.Conn, jetstream.JetStream) {
	if given := os.Getenv("NATS_INBOX_PREFIX"); given != "" {
		prefix = given
	}
	options := []nats.Option{nats.CustomInboxPrefix(prefix), nats.MaxReconnects(-1)}
	if file := os.Getenv("NATS_CREDS"); file != "" {
		options = append(options, nats.UserCredentials(file))
	}
	if file := os.Getenv("NATS_NKEY"); file != "" {
		option, err := nats.NkeyOptionFromSeed(file)
		must(err)
		options = append(options, option)
	}
	if user := os.Getenv("NATS_USER"); user != "" {
		options = append(options, nats.UserInfo(user, os.Getenv("NATS_PASSWORD")))
	}
	if token := os.Getenv("NATS_TOKEN"); token != "" {
		options = append(options, nats.Token(token))
	}
	if file := os.Getenv("NATS_CA"); file != "" {
		options = append(options, nats.RootCAs(file))
	}
	if file := os.Getenv("NATS_CERT"); file != "" {
		options = append(options, nats.ClientCert(file, os.Getenv("NATS_KEY")))
	}
	url := os.Getenv("NATS_URL")
	if url == "" {
		url = nats.DefaultURL
	}
	nc, err := nats.Connect(url, options...)
	must(err)
	js, err := jetstream.New(nc)
	must(err)
	return nc, js
}

// store publishes until the stream has confirmed. The id makes the repeats one.
func store(js jetstream.JetStream, subject string, command any, id string) {
	body, err := json.Marshal(command)
	must(err)
	for {
		_, err := js.Publish(context.Background(), subject, body, jetstream.WithMsgID(id))
		var refused *jetstream.APIError
		switch {
		case err == nil:
			return
		case errors.As(err, &refused) && refused.ErrorCode == tooManyRequests: // others send more than the stream takes in
		case errors.Is(err, context.DeadlineExceeded), errors.Is(err, nats.ErrTimeout),
			errors.Is(err, jetstream.ErrNoStreamResponse), errors.Is(err, nats.ErrNoResponders):
		default:
			log.Fatal(err)
		}
		time.Sleep(time.Second)
	}
}

// must ends the program unless all went well.
func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
