/* A slow link between two network namespaces, made of two TUN devices and a queue in each direction.
 *
 *     wanlink NAMESPACE_A NAMESPACE_B DEVICE RATE_MBIT DELAY_MS QUEUE_MS
 *
 * Each namespace gets a device of that name. A packet read from one of them leaves when the bytes before it have left
 * at the rate, arrives after the delay, and is dropped if the bytes before it would take longer than the queue holds.
 * Time goes in ticks of 0.2 ms while packets are on their way. "ready" on stdout when the devices are there; on SIGTERM
 * a line for each direction, packets, bytes and drops, and one with the processor's seconds. Ends with its parent. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { SLOTS = 1 << 15, LARGEST = 9216 };
static const int64_t SECOND = 1000000000, TICK = 200000;

struct packet {
    int64_t arrival;
    int length;
    char *bytes;
};

struct way {
    int from, to;
    struct packet queue[SLOTS];
    unsigned head, tail;
    int64_t free_at;
    long packets, dropped;
    int64_t carried;
};

static struct way ways[2];
static volatile sig_atomic_t ended;

static void end(int number) { (void)number; ended = 1; }

static void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now(clockid_t clock) {
    struct timespec moment;
    clock_gettime(clock, &moment);
    return moment.tv_sec * SECOND + moment.tv_nsec;
}

static int device_in(const char *namespace, const char *name) {
    char path[256];
    snprintf(path, sizeof path, "/run/netns/%s", namespace);
    int network = open(path, O_RDONLY | O_CLOEXEC);
    if (network < 0 || setns(network, CLONE_NEWNET)) fail(path);
    close(network);
    int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (device < 0 || ioctl(device, TUNSETIFF, &request)) fail("/dev/net/tun");
    return device;
}

static void take(struct way *way, int64_t time, double ns_per_byte, int64_t delay, int64_t longest) {
    static char bytes[LARGEST];
    ssize_t length;
    while ((length = read(way->from, bytes, sizeof bytes)) > 0) {
        if (way->free_at < time) way->free_at = time;
        if (way->free_at - time > longest || way->tail - way->head == SLOTS) {
            way->dropped++;
            continue;
        }
        way->free_at += (int64_t)(length * ns_per_byte);
        char *copy = malloc(length);
        if (!copy) fail("malloc");
        memcpy(copy, bytes, length);
        way->queue[way->tail++ % SLOTS] = (struct packet){way->free_at + delay, (int)length, copy};
        way->packets++;
        way->carried += length;
    }
}

static void deliver(struct way *way, int64_t time) {
    while (way->head != way->tail && way->queue[way->head % SLOTS].arrival <= time) {
        struct packet *first = &way->queue[way->head++ % SLOTS];
        if (write(way->to, first->bytes, first->length) < 0) way->dropped++;
        free(first->bytes);
    }
}

int main(int count, char **given) {
    if (count != 7) {
        fprintf(stderr, "wanlink NAMESPACE_A NAMESPACE_B DEVICE RATE_MBIT DELAY_MS QUEUE_MS\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    prctl(PR_SET_TIMERSLACK, 1);
    signal(SIGTERM, end);
    signal(SIGINT, SIG_IGN);
    ways[0].from = ways[1].to = device_in(given[1], given[3]);
    ways[1].from = ways[0].to = device_in(given[2], given[3]);
    double ns_per_byte = 8e3 / atof(given[4]);
    int64_t delay = (int64_t)(atof(given[5]) * 1e6), longest = (int64_t)(atof(given[6]) * 1e6);
    puts("ready");
    fflush(stdout);
    while (!ended) {
        int busy = 0;
        for (int i = 0; i < 2; i++) {
            int64_t time = now(CLOCK_MONOTONIC);
            take(&ways[i], time, ns_per_byte, delay, longest);
            deliver(&ways[i], time);
            busy |= ways[i].head != ways[i].tail;
        }
        if (busy) {
            struct timespec tick = {0, TICK};
            nanosleep(&tick, NULL);
        } else {
            struct pollfd devices[2] = {{ways[0].from, POLLIN, 0}, {ways[1].from, POLLIN, 0}};
            poll(devices, 2, 1000);
        }
    }
    for (int i = 0; i < 2; i++)
        fprintf(stderr, "%ld %lld %ld\n", ways[i].packets, (long long)ways[i].carried, ways[i].dropped);
    fprintf(stderr, "%.2f\n", now(CLOCK_PROCESS_CPUTIME_ID) / 1e9);
    return 0;
}
