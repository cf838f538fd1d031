/* An agent that answers each message with the same words, or with what it has got: ./echo SANDBOX

   What its user wrote while nobody ran waits in the sandbox's inbox.
   cc echo.c -o echo $(pkg-config --cflags --libs libnats libcjson) */

#include "common.h"

/* Asks until an adapter answers. `*error` is the sentence that it answers instead, or NULL. Frees the request. */
static natsMsg *ask(natsConnection *nc, const char *verb, const char *sandbox, cJSON *request, const char **error)
{
    char *text = cJSON_PrintUnformatted(request), subject[128];

    snprintf(subject, sizeof subject, "wechat.svc.%s.%s", verb, sandbox);
    for (;;) {
        natsMsg *msg = NULL;
        natsStatus status = natsConnection_RequestString(&msg, nc, subject, text, 15000);
        const char *code = "503";

        *error = NULL;
        if (status == NATS_OK && natsMsgHeader_Get(msg, "Nats-Service-Error-Code", &code) == NATS_OK)
            must(natsMsgHeader_Get(msg, "Nats-Service-Error", error), subject);
        else if (status != NATS_OK && status != NATS_TIMEOUT && status != NATS_NO_RESPONDERS)
            must(status, subject);
        if (status == NATS_OK && (*error == NULL || (strcmp(code, "429") != 0 && strcmp(code, "503") != 0))) {
            free(text);
            cJSON_Delete(request);
            return msg;
        }
        natsMsg_Destroy(msg);
        nats_Sleep(1000); /* no adapter is there, or it has no time */
    }
}

/* Writes the number of bytes of an object, which may still be on their way from WeChat, or the sentence that says why
   there are none. A program that keeps the bytes compares them with the header Wechat-Sha256. */
static void read_media(natsConnection *nc, const char *sandbox, const char *position, const char *object,
                       char *words, size_t size)
{
    long total = 0;
    double after = 0;

    do {
        cJSON *request = cJSON_CreateObject();
        const char *error, *next = "0";
        natsMsg *piece;

        cJSON_AddStringToObject(request, "object", object);
        cJSON_AddStringToObject(request, "position", position);
        cJSON_AddNumberToObject(request, "wait_s", 10);
        cJSON_AddNumberToObject(request, "after", after);
        piece = ask(nc, "media.get", sandbox, request, &error);
        if (error != NULL) {
            snprintf(words, size, "%s", error);
        } else {
            total += natsMsg_GetDataLength(piece);
            if (natsMsgHeader_Get(piece, "Wechat-Next", &next) != NATS_OK)
                next = "0"; /* this was the last piece */
            snprintf(words, size, "%ld bytes", total);
        }
        after = atof(next);
        natsMsg_Destroy(piece);
    } while (after > 0);
}

/* The command. Its id follows from what caused it; it names the user, since another may be bound by now. */
static cJSON *answer(natsConnection *nc, const char *sandbox, const char *position, const cJSON *said)
{
    cJSON *command = cJSON_CreateObject();
    const char *text = text_of(said, "text");
    char id[256], media[512];
    size_t size = strlen(text) + 16384;
    char *words = malloc(size);
    const cJSON *item;

    if (words == NULL)
        must(NATS_NO_MEMORY, "answer");
    snprintf(id, sizeof id, "%s.echo.%s", sandbox, text_of(said, "id"));
    snprintf(words, size, *text != '\0' ? "You said: %s" : "You sent:%s", text);
    if (*text == '\0')
        cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(said, "items")) {
            const char *object = text_of(cJSON_GetObjectItemCaseSensitive(item, "media"), "object");
            size_t end = strlen(words);

            snprintf(words + end, size - end, " %s", text_of(item, "kind"));
            if (*object != '\0') {
                read_media(nc, sandbox, position, object, media, sizeof media);
                end = strlen(words);
                snprintf(words + end, size - end, " (%s)", media);
            }
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
    const char *sandbox = argc > 1 ? argv[1] : "s1", *error;
    natsConnection *nc;
    natsSubscription *bell = NULL;
    double reader = 0; /* the first request makes this program the sandbox's only reader */
    char own[80], in[128], out[128], after[64] = "";

    snprintf(own, sizeof own, "_INBOX_%s", sandbox); /* the only inboxes that a sandbox may be permitted */
    nc = connected(inbox_prefix(own));
    snprintf(in, sizeof in, "wechat.in.%s", sandbox);
    snprintf(out, sizeof out, "wechat.out.%s", sandbox);
    must(natsConnection_SubscribeSync(&bell, nc, in), in);
    printf("echo agent of %s: ready\n", sandbox);
    fflush(stdout);
    for (;;) {
        cJSON *request = cJSON_CreateObject(), *page;
        const cJSON *handed;
        natsMsg *msg;

        if (reader > 0)
            cJSON_AddNumberToObject(request, "reader", reader);
        if (*after != '\0')
            cJSON_AddStringToObject(request, "after", after);
        msg = ask(nc, "next", sandbox, request, &error);
        if (error != NULL) {
            fprintf(stderr, "%s\n", error); /* such as: another program reads the sandbox now */
            return 1;
        }
        page = cJSON_ParseWithLength(natsMsg_GetData(msg), natsMsg_GetDataLength(msg));
        natsMsg_Destroy(msg);
        reader = number_of(page, "reader");
        *after = '\0';
        cJSON_ArrayForEach(handed, cJSON_GetObjectItemCaseSensitive(page, "messages")) {
            const cJSON *said = cJSON_GetObjectItemCaseSensitive(handed, "message");
            const char *position = text_of(handed, "position");
            cJSON *command = answer(nc, sandbox, position, said);

            store(nc, out, command, NULL);
            /* The next request confirms it. A crash before brings the message again, and the id keeps its answer single. */
            snprintf(after, sizeof after, "%s", position);
            printf("answered %s\n", text_of(said, "id"));
            fflush(stdout);
            cJSON_Delete(command);
        }
        cJSON_Delete(page);
        if (*after == '\0') {
            natsMsg *ring = NULL;

            natsSubscription_NextMsg(&ring, bell, 30000); /* a ring may get lost */
            natsMsg_Destroy(ring);
        }
    }
}
