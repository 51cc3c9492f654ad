"""The gateway: the Open Inference Protocol, by HTTP and gRPC, in front of a controller.

A process of its own on the asynchronous client, because the controller's loop has no time to parse requests.
`service.py` serves requests; `http/` and `rpc/` are the two protocols that they come by.
"""
