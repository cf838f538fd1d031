/* An agent that answers each message with the same words: ./echo SANDBOX

   Bind the sandbox with the option `durable`: what its user wrote then waits in its consumer while nobody runs.
   cc echo.c -o echo $(pkg-config --cflags --libs libnats libcjson) */

#include "common.h"

/* The command. Its id follows from what caused it; it names the user, since another may be bound by now. */
static cJSON *answer(const char *sandbox, const cJSON *said)
{
    cJSON *command = cJSON_CreateObject();
    const char *text = text_of(said, "text");
    char id[256];
    size_t size = strlen(text) + 1024;
    char *words = malloc(size);
    const cJSON *item;

    if (words == NULL)
        must(NATS_NO_MEMORY, "answer");
    snprintf(id, sizeof id, "%s.echo.%s", sandbox, text_of(said, "id"));
    if (*text != '\0') {
        snprintf(words, size, "You said: %s", text);
    } else {
        snprintf(words, size, "You sent:");
        cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(said, "items"))
            snprintf(words + strlen(words), size - strlen(words), " %s", text_of(item, "kind"));
    }
    cJSON_AddStringToObject(command, "id", id);
    cJSON_AddStringToObject(command, "user", text_of(said, "user"));
    cJSON_AddStringToObject(command, "text", words);
    cJSON_AddStringToObject(command, "reply_to", text_of(said, "id"));
    free(words);
    return command;
}

int main(int argc, char **argv)
{
    const char *sandbox = argc > 1 ? argv[1] : "s1";
    /* Asks for the next message; within 30 s there is one, or the word that there is none. In plain NATS, since a
       sandbox need not be permitted anything else of JetStream. */
    const char *ask = "{\"batch\":1,\"expires\":30000000000}";
    natsConnection *nc;
    jsCtx *js = NULL;
    natsSubscription *pulled = NULL;
    char own[80], next[128], out[128], inbox[128];

    snprintf(own, sizeof own, "_INBOX_%s", sandbox); /* the only inboxes that a sandbox may be permitted */
    nc = connected(inbox_prefix(own));
    snprintf(inbox, sizeof inbox, "%s.%llx", inbox_prefix(own), (unsigned long long) nats_NowInNanoSeconds());
    must(natsConnection_SubscribeSync(&pulled, nc, inbox), "inbox");
    must(natsConnection_JetStream(&js, nc, NULL), "JetStream");
    snprintf(next, sizeof next, "$JS.API.CONSUMER.MSG.NEXT.WECHAT_IN.%s", sandbox);
    snprintf(out, sizeof out, "wechat.out.%s", sandbox);
    printf("echo agent of %s: ready\n", sandbox);
    fflush(stdout);
    while (!natsConnection_IsClosed(nc)) {
        natsMsg *msg = NULL;
        const char *status = NULL;

        natsConnection_PublishRequestString(nc, next, inbox, ask);
        switch (natsSubscription_NextMsg(&msg, pulled, 35000)) {
        case NATS_OK:
            break;
        case NATS_NO_RESPONDERS:
            nats_Sleep(1000); /* not bound yet */
            continue;
        default:
            continue; /* NATS was away */
        }
        if (natsMsgHeader_Get(msg, "Status", &status) != NATS_OK) { /* else nothing was said */
            cJSON *said = cJSON_ParseWithLength(natsMsg_GetData(msg), natsMsg_GetDataLength(msg));
            cJSON *command = answer(sandbox, said);

            store(js, out, command, text_of(command, "id"));
            /* A crash before this line brings the message again, and the id keeps its answer single. */
            must(natsConnection_PublishString(nc, natsMsg_GetReply(msg), "+ACK"), "ack");
            printf("answered %s\n", text_of(said, "id"));
            fflush(stdout);
            cJSON_Delete(command);
            cJSON_Delete(said);
        }
        natsMsg_Destroy(msg);
    }
    return 1;
}
