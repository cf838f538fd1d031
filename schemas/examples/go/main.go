// Programs to start from: echo SANDBOX | send SANDBOX TEXT | onboard login SANDBOX | onboard bind SANDBOX BOT
package main

import (
	"encoding/json"
	"errors"
	"log"
	"os"
	"time"

	"github.com/nats-io/nats.go"
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
func connect(prefix string) *nats.Conn {
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
	return nc
}

// store requests until the stream has confirmed that it has the command. The id in the body makes the repeats one.
func store(nc *nats.Conn, msg *nats.Msg) {
	for {
		answer, err := nc.RequestMsg(msg, 5*time.Second)
		if err == nil {
			var ack struct {
				Error *struct {
					Code        int    `json:"code"`
					ErrCode     int    `json:"err_code"`
					Description string `json:"description"`
				} `json:"error"`
			}
			must(json.Unmarshal(answer.Data, &ack))
			if ack.Error == nil {
				return
			}
			if ack.Error.Code != 503 && ack.Error.ErrCode != tooManyRequests {
				log.Fatal(ack.Error.Description)
			}
		} else if !errors.Is(err, nats.ErrTimeout) && !errors.Is(err, nats.ErrNoResponders) {
			log.Fatal(err)
		}
		time.Sleep(time.Second) // no stream now, or others send more than it takes in
	}
}

// message is a command for a subject.
func message(subject string, command any) *nats.Msg {
	body, err := json.Marshal(command)
	must(err)
	msg := nats.NewMsg(subject)
	msg.Data = body
	return msg
}

// must ends the program unless all went well.
func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
