// Links with a latency, for `make bench-split`: forwards UDP and TCP between ports of 127.0.0.1 and lets everything wait.
//
//   delay_proxy (udp|tcp LISTEN TO)...
//
// Lines on standard input: `delay MS` sets the one-way delay from now on; `sent` prints how many bytes and datagrams of UDP
// were forwarded so far. It never drops, reorders or shapes, so it is a best case for everything that is measured through it.
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <queue>
#include <string>
#include <vector>

using Clock = std::chrono::steady_clock;

// A socket, and where what it receives goes.
struct End {
    enum Kind { UdpListen, UdpBack, TcpListen, TcpPipe } kind;
    int fd;
    sockaddr_in to;    // of a listener
    int peer = -1;     // UdpBack: the listener; TcpPipe: the other socket
    sockaddr_in client; // UdpBack: who is answered
};

struct Parcel {
    Clock::time_point due;
    unsigned long order;
    int fd;
    bool addressed, closing;
    sockaddr_in to;
    std::vector<char> bytes;
    bool operator<(const Parcel & other) const { return due != other.due ? due > other.due : order > other.order; }
};

static int ep;
static std::map<int, End> ends;
static std::map<std::pair<int, std::pair<uint32_t, uint16_t>>, int> routes;
static std::priority_queue<Parcel> parcels;
static double delay_ms = 0;
static unsigned long order = 0, bytes_sent = 0, datagrams = 0;

static sockaddr_in local(int port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

static void watch(End end) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = end.fd;
    epoll_ctl(ep, EPOLL_CTL_ADD, end.fd, &event);
    ends[end.fd] = end;
}

static int open_socket(int kind, int port) {
    int fd = socket(AF_INET, kind, 0), yes = 1, room = 4 << 20;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    if (kind == SOCK_STREAM) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    sockaddr_in address = local(port);
    if (port != 0 && bind(fd, (sockaddr *) &address, sizeof address) != 0) {
        perror("delay_proxy: bind");
        exit(1);
    }
    return fd;
}

static void post(int fd, bool addressed, sockaddr_in to, std::vector<char> bytes, bool closing = false) {
    auto due = Clock::now() + std::chrono::nanoseconds((long long) (delay_ms * 1e6));
    parcels.push(Parcel{due, order++, fd, addressed, closing, to, std::move(bytes)});
}

static void receive(int fd) {
    static std::vector<char> room(1 << 16);
    End end = ends[fd];
    if (end.kind == End::TcpListen) {
        int down = accept(fd, nullptr, nullptr), up = open_socket(SOCK_STREAM, 0), yes = 1;
        setsockopt(down, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        if (connect(up, (sockaddr *) &end.to, sizeof end.to) != 0) {
            close(down);
            close(up);
            return;
        }
        watch(End{End::TcpPipe, down, {}, up, {}});
        watch(End{End::TcpPipe, up, {}, down, {}});
        return;
    }
    if (end.kind == End::TcpPipe) {
        ssize_t got = recv(fd, room.data(), room.size(), 0);
        if (got <= 0) {
            epoll_ctl(ep, EPOLL_CTL_DEL, fd, nullptr);
            post(end.peer, false, {}, {}, true);
            return;
        }
        post(end.peer, false, {}, std::vector<char>(room.begin(), room.begin() + got));
        return;
    }
    while (true) {
        sockaddr_in from{};
        socklen_t length = sizeof from;
        ssize_t got = recvfrom(fd, room.data(), room.size(), MSG_DONTWAIT, (sockaddr *) &from, &length);
        if (got < 0) return;
        bytes_sent += got;
        datagrams++;
        std::vector<char> bytes(room.begin(), room.begin() + got);
        if (end.kind == End::UdpBack) {
            post(end.peer, true, end.client, std::move(bytes));
            continue;
        }
        auto key = std::make_pair(fd, std::make_pair((uint32_t) from.sin_addr.s_addr, (uint16_t) from.sin_port));
        auto known = routes.find(key);
        if (known == routes.end()) {
            int up = open_socket(SOCK_DGRAM, 0);
            watch(End{End::UdpBack, up, {}, fd, from});
            known = routes.emplace(key, up).first;
        }
        post(known->second, true, end.to, std::move(bytes));
    }
}

static void deliver(const Parcel & parcel) {
    if (parcel.closing) {
        shutdown(parcel.fd, SHUT_WR);
        return;
    }
    size_t at = 0;
    while (at < parcel.bytes.size()) {
        ssize_t sent = parcel.addressed
            ? sendto(parcel.fd, parcel.bytes.data(), parcel.bytes.size(), 0, (const sockaddr *) &parcel.to, sizeof parcel.to)
            : send(parcel.fd, parcel.bytes.data() + at, parcel.bytes.size() - at, MSG_NOSIGNAL);
        if (sent <= 0 || parcel.addressed) return;
        at += sent;
    }
}

int main(int argc, char ** argv) {
    ep = epoll_create1(0);
    for (int at = 1; at + 2 < argc; at += 3) {
        bool tcp = strcmp(argv[at], "tcp") == 0;
        int fd = open_socket(tcp ? SOCK_STREAM : SOCK_DGRAM, atoi(argv[at + 1]));
        if (tcp) listen(fd, 16);
        watch(End{tcp ? End::TcpListen : End::UdpListen, fd, local(atoi(argv[at + 2])), -1, {}});
    }
    epoll_event input{};
    input.events = EPOLLIN;
    input.data.fd = 0;
    epoll_ctl(ep, EPOLL_CTL_ADD, 0, &input);
    printf("ready\n");
    fflush(stdout);
    while (true) {
        timespec wait{}, *bound = nullptr;
        if (!parcels.empty()) {
            auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(parcels.top().due - Clock::now()).count();
            left = left < 0 ? 0 : left;
            wait = {left / 1000000000, left % 1000000000};
            bound = &wait;
        }
        epoll_event events[64];
        int ready = epoll_pwait2(ep, events, 64, bound, nullptr);
        for (int at = 0; at < ready; at++) {
            if (events[at].data.fd != 0) {
                receive(events[at].data.fd);
                continue;
            }
            char line[64];
            ssize_t got = read(0, line, sizeof line - 1);
            if (got <= 0) return 0;
            line[got] = 0;
            if (strncmp(line, "delay ", 6) == 0) delay_ms = atof(line + 6);
            printf("%lu %lu\n", bytes_sent, datagrams);
            fflush(stdout);
        }
        while (!parcels.empty() && parcels.top().due <= Clock::now()) {
            deliver(parcels.top());
            parcels.pop();
        }
    }
}
