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
    natsConnection *nc;
    jsCtx *js = NULL;
    jsSubOptions consumer;
    natsSubscription *pulled = NULL;
    natsMsgList list;
    char own[80], inbox[128], out[128];

    snprintf(own, sizeof own, "_INBOX_%s", sandbox); /* the only inboxes that a sandbox may be permitted */
    nc = connected(inbox_prefix(own));
    must(natsConnection_JetStream(&js, nc, NULL), "JetStream");
    printf("echo agent of %s: ready\n", sandbox);
    fflush(stdout);
    snprintf(inbox, sizeof inbox, "wechat.inbox.%s", sandbox);
    snprintf(out, sizeof out, "wechat.out.%s", sandbox);
    jsSubOptions_Init(&consumer);
    consumer.Stream = "WECHAT_IN";
    consumer.Consumer = sandbox;
    while (js_PullSubscribe(&pulled, js, inbox, sandbox, NULL, &consumer, NULL) != NATS_OK)
        nats_Sleep(1000); /* not bound yet */
    while (!natsConnection_IsClosed(nc)) {
        natsStatus status = natsSubscription_Fetch(&list, pulled, 1, 30000, NULL);
        cJSON *said, *command;

        if (status != NATS_OK) {
            if (status != NATS_TIMEOUT) /* else nothing was said */
                nats_Sleep(1000);
            continue;
        }
        said = cJSON_ParseWithLength(natsMsg_GetData(list.Msgs[0]), natsMsg_GetDataLength(list.Msgs[0]));
        command = answer(sandbox, said);
        store(js, out, command, text_of(command, "id"));
        /* A crash before this line brings the message again, and the id keeps its answer single. */
        must(natsMsg_Ack(list.Msgs[0], NULL), "ack");
        printf("answered %s\n", text_of(said, "id"));
        fflush(stdout);
        cJSON_Delete(command);
        cJSON_Delete(said);
        natsMsgList_Destroy(&list);
    }
    return 1;
}
