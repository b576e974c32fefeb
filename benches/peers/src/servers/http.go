// Answers each request with `Hello, world!`; behind TLS if a certificate and its key are named.
package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
)

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("listening on", listener.Addr())
	hello := func(response http.ResponseWriter, _ *http.Request) {
		io.WriteString(response, "Hello, world!")
	}
	server := http.Server{Handler: http.HandlerFunc(hello)}
	if len(os.Args) == 3 {
		server.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS13}
		log.Fatal(server.ServeTLS(listener, os.Args[1], os.Args[2]))
	}
	log.Fatal(server.Serve(listener))
}
